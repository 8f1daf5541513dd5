"""Models by name, which of their tensors are prunable, and what a forward pass costs."""
