"""Wire messages of the control plane: `.proto` sources and what `make proto` generates from them."""
