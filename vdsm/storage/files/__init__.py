"""Image files and qemu-img: the headers of foreign files, and the command lines for our own."""
