"""What is done to an ``nn.Module``: which weight gets what, surgery, plans, renormalisation, statistics, folding."""
