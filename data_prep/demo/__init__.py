"""Two small ImageNet-shaped sets of real pictures. Begin with `command.py`."""
