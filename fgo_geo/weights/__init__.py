"""What a weight is made of: its kinds, components (layouts), groups (PI / PO / PIO), norms and radii."""
