"""Token boxes: which region of the image each image token, of the decoder or of an encoder, stands for."""
