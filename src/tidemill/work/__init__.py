"""What fills the trough: batches of requests (and, later, jobs)."""
