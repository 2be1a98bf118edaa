"""The layers a decoder is made of, one family a file."""
