"""What setup.py needs to build the extension modules: finding the toolkits and driving the compilers."""
