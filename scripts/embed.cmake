# A file as an array of C:  cmake -DINPUT=FILE -DOUTPUT=FILE.c -DNAME=NAME -DHEADER=FILE.h -P embed.cmake
file(READ ${INPUT} bytes HEX)
string(REGEX REPLACE "(..)" "0x\\1," bytes "${bytes}")
string(REGEX REPLACE "((0x..,)(0x..,)(0x..,)(0x..,)(0x..,)(0x..,)(0x..,)(0x..,))" "\\1\n" bytes "${bytes}")
file(WRITE ${OUTPUT} "#include \"${HEADER}\"\n\nconst unsigned char ${NAME}[] = {\n${bytes}};\n"
  "const size_t ${NAME}_size = sizeof ${NAME};\n")
