"""Full models into one, tensor by tensor."""
