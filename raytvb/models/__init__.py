"""open_clip models and their zero-shot heads; accuracies with merged weights."""
