"""Raw image archives -> WebDataset shards and FFCV files. Entry point: ``python -m data_prep --help``."""
