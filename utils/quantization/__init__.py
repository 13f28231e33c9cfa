"""Networks whose tensors take few values, as integer arithmetic has them."""
