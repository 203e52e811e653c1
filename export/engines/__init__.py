"""From a bundle's graphs to TensorRT engines, built ahead by a command and never on the way of a request."""
