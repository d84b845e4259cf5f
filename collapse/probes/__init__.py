"""What a representation is worth on labelled images: the paper's linear probe, a quick one, nearest neighbours."""
