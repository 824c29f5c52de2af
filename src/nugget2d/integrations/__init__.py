"""Ways into nugget2d from other libraries; none of them knows of it before its `register` is called."""
