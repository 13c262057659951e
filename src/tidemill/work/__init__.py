"""Work that may wait: batches of requests, and jobs."""
