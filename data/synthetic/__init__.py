"""The Pailitao-like log: planted tastes, 192 columns, a known best AUC."""
