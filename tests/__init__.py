"""A package, so that no other one called `tests` takes the place of this folder."""
