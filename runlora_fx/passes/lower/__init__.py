"""Lower: operators that hide a product, spelled out before the graph is read, and put back."""
