"""Policy losses, advantages and the metrics of an update: pure functions of tensors and numbers."""
