"""Starting a run where a scheduler says when and where: a file per site turns an `Order` into its language."""
