"""What goes over the wire: fields of bodies, replies, events, errors."""
