"""How the tensors of one packed module mean a matrix: one file for each way to pack."""
