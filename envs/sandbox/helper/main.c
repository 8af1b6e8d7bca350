/* The uses of the helper: see helper.h. */
#include "helper.h"
#include <sys/un.h>

char *title;
size_t title_room;

static int container(const char *path, const char *dir) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof to.sun_path) return 2;
    strcpy(to.sun_path, path);
    ctl = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (ctl < 0 || connect(ctl, (struct sockaddr *)&to, sizeof to)) return 75;
    prepare_broker(dir, dir);
    if (prctl(PR_SET_DUMPABLE, 0)) die("prctl", "");
    filter();
    broker();
    return 0;
}

int main(int argc, char **argv) {
    title = argv[0], title_room = (size_t)(argv[argc - 1] + strlen(argv[argc - 1]) - title);
    if (argc == 5 && !strcmp(argv[1], "zygote")) return zygote(atoi(argv[2]), argv[3], argv[4]);
    if (argc == 4 && !strcmp(argv[1], "broker")) return container(argv[2], argv[3]);
    if (argc > 8 && !strcmp(argv[1], "store")) {
        ctl = atoi(argv[2]);
        return host_store(argv[3], (uid_t)strtoul(argv[4], NULL, 10), argv[5], argv[6], argv[7], argv + 8);
    }
    if (argc > 2 && !strcmp(argv[1], "free")) {
        for (int i = 2; i < argc; i++) free_store(argv[i]);
        return 0;
    }
    fputs("usage: helper zygote|broker|store|free ... (see helper.h)\n", stderr);
    return 2;
}
