"""What is done with nodes; imports `block` and `errors`, names no driver."""
