"""The Fisher matrix and the loss Hessian of a network as products, and their derivatives, checked."""
