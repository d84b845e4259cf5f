"""What a run is made by, as plain data, and the augmented views of images that it describes.

config  the paper's recipe as defaults, presets as plain JSON;  views  augmentations, each image its own draw
"""
