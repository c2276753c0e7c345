"""From a pretrained model to a task: classifiers that are tuned, linear models that are fitted."""
