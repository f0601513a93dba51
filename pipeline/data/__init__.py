"""Sample order, readers of both file formats, augmentation."""
