"""From values to packed integers and back."""
