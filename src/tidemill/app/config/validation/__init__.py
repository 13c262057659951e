"""What the schema alone cannot say of a configuration: bounds, and what fits together."""
