"""A run's configuration: loaded and checked, section by section."""
