"""What a run needs a GPU and a step, from the model's shapes alone: nothing is loaded, downloaded
or trained."""
