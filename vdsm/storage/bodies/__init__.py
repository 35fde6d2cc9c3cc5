"""Job bodies: what a worker does for a job of storage, and how it is undone."""
