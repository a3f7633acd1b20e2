/* Runs a fuzz target on the files of a folder:  replay FOLDER */
#include "fuzz.h"

#include <dirent.h>

int main(int count, char **arguments) {
  DIR *folder = count == 2 ? opendir(arguments[1]) : NULL;
  struct dirent *entry;
  int files = 0;
  if (!folder) {
    fprintf(stderr, "usage: %s FOLDER\n", arguments[0]);
    return 2;
  }
  while ((entry = readdir(folder))) {
    char path[4096];
    if (entry->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "%s/%s", arguments[1], entry->d_name);
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0) return 1;
    size_t size = (size_t)ftell(file);
    rewind(file);
    uint8_t *data = malloc(size + 1); /* exactly: a read beyond it is seen by AddressSanitizer */
    if (!data || fread(data, 1, size, file) < size) return 1;
    fclose(file);
    LLVMFuzzerTestOneInput(data, size);
    free(data);
    ++files;
  }
  closedir(folder);
  printf("%d files\n", files);
  return files ? 0 : 1;
}
