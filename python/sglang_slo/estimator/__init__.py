"""Output lengths: features at arrival, a model that learns while serving, bounds that hold; see `service`."""
