"""From raw head outputs to boxes, and from boxes to losses and average precision."""
