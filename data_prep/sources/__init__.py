"""Raw sources of images, of all the kinds in which ImageNet comes. Begin with `detect.py`."""
