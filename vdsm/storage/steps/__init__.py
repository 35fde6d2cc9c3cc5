"""What is done to a repository within one call, step by step. Runs in its I/O child and in workers."""
