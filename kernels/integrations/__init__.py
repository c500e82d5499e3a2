"""What fits the kernels to other packages; a module here is imported only when it is asked for."""
