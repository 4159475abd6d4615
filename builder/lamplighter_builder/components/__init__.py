"""Parts of a decoder graph. They never name a model; a model file composes them."""
