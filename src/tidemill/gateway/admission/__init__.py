"""Whether a request may run now, and who pays: rate limits, the queue of a full model, holds on money."""
