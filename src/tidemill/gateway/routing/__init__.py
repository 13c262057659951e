"""From a model to one of its replicas: health, load, cached prefixes, models without a replica."""
