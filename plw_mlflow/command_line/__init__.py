"""What the entry points share: options of a config, checks before anything heavy, errors as one line."""
