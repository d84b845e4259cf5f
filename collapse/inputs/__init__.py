"""What texts and sounds are to a network, as collapse/images is for images."""
