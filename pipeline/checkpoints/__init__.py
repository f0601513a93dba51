"""A run's state on disk: written, resumed, looked into, taken over from other weights."""
