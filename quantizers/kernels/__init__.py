"""Products on quantized weights that several backends share, by the form in which the weights are stored."""
