"""Layer by layer, each part is packed to give what the unquantised model gives there: by correction, and by gradient."""
