"""The run directory and its checkpoints: names, format, saving in the background."""
