"""The only room where model, loss and batch meet."""
