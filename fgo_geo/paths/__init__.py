"""How a step is computed: one protocol, several execution paths, and the router that chooses between them."""
