/* The uses of the helper: see helper.h. */
#include "helper.h"
#include <sys/un.h>

static int container(const char *path, const char *dir) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    snprintf(to.sun_path, sizeof to.sun_path, "%s", path);
    int stream = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (stream < 0 || connect(stream, (struct sockaddr *)&to, sizeof to)) return 75;
    take_places(stream, -1);
    broker(dir);
}

int main(int argc, char **argv) {
    size_t room = (size_t)(argv[argc - 1] + strlen(argv[argc - 1]) - argv[0]);
    if (argc == 3 && !strcmp(argv[1], "zygote")) return zygote(atoi(argv[2]), argv[0], room);
    if (argc == 3 && !strcmp(argv[1], "calls")) return carry_out(atoi(argv[2]));
    if (argc == 4 && !strcmp(argv[1], "broker")) return container(argv[2], argv[3]);
    fputs("usage: helper zygote|calls|broker ... (see helper.h)\n", stderr);
    return 2;
}
