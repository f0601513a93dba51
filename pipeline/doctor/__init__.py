"""What would go wrong on the hosts of a run, looked at before it: side by side, in a table."""
